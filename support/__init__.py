"""The plumbing: everything a reader of the method can skip. One file, one job."""
