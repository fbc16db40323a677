"""serve-engine measured beside a bare Segmenter and beside other servers: `python -m benchmarks.serving`."""
