"""`python -m lit_prune`: the third door to the same entry point (also taken when Lightning relaunches a process)."""

from lit_prune.cli import main

if __name__ == "__main__":
    main()
