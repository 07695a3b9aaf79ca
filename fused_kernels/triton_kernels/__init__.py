"""The rungs in Triton, one a file; a file is imported when its rung is first called, for Triton is not everywhere."""
