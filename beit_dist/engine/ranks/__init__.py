"""The ranks of a run: how they meet, agree, stop together, and what is known of each."""
