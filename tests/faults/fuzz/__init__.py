"""The fuzzer of what a resume reads: files are damaged, and what comes of it is compared."""
