"""The offline job: freeze the list of images, write token shards with any number of workers, finish.

``freeze.py`` makes the list, ``worker.py`` the shards, ``finish.py`` the manifest; ``sources.py``, ``job.py``
and ``commits.py`` are the small files they agree by.
"""
