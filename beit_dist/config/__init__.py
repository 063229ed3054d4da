"""Settings: how they are read, the sections that recipes share, and one module for each kind of recipe.

A recipe is refused at the start if a key is unknown, a type is wrong or two settings contradict each other. The
message names the field, what it got, what was expected and the way out. What the DeepSpeed JSON sets (ZeRO stage,
accumulation type) is not repeated here: see ``beit_dist/engine/resolve.py``.

The docstring below a setting is its entry in ``docs/settings.md``; ``python tools/doc_tables.py`` writes that
page.
"""
