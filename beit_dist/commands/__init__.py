"""What users type: a module for each command of ``beit``, with its ``parser()`` and its ``main(argv)``.

Importing one is cheap: whatever loads torch, pydantic or matplotlib is imported once the command line is parsed.
So ``--help`` is quick, and so is the start of a spawned process, which imports the main module once more.
"""
