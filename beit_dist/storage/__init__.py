"""Files in a folder or below a URL, behind one small interface; retries and time limits in one place."""
