"""The earlier name of `python -m sweep`."""

from deploy.cli import interrupted_by_signals
from sweep import main

if __name__ == "__main__":
    with interrupted_by_signals():
        main()
