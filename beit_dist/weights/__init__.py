"""Every form in which weights come in and go out."""
