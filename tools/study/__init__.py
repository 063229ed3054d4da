"""The study of docs/results.md: its trials as data, how they are run, and what is said of them."""
