"""`python -m vcr1_fast` is `vcr1-fast`."""

from vcr1_fast.cli import main

if __name__ == "__main__":
    main()
