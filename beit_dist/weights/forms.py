"""What weights are exported as, named without loading anything."""

FORMS = ("hf", "timm", "unilm")
"""Other projects' forms: names and files."""
PRECISIONS = ("fp32", "bf16")
"""Of the values."""
