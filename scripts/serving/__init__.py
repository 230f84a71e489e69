"""What the server needs beside predict.py."""
