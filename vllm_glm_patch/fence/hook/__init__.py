"""A package only so that the wheel carries sitecustomize.py; this folder is put on PYTHONPATH, never imported."""
