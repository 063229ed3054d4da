"""``python -m beit_dist`` is ``beit``; launchers start it by ``--module beit_dist``."""

from beit_dist.commands.main import start

if __name__ == "__main__":
    start()
