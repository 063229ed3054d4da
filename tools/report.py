"""``beit report`` of this checkout, which need not be installed."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from beit_dist.commands.report import main
    from beit_dist.errors import exit_cleanly

    exit_cleanly(main)
