"""The Triton kernels themselves, and nothing else: imported only when one is about to run, so torch alone is enough."""
