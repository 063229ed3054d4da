"""Kinds of training: each is a folder with a task, and what only it needs."""
