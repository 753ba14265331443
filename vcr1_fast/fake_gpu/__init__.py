"""The learner's real code on GPUs that are not there: fake CUDA tensors, a fake process group, and a meter.

Tensors on the GPU have shapes and no values (torch's FakeTensorMode); host tensors are real. So sharding, forward,
backward, optimizer and every collective run as they would, and what raises on a GPU for its code raises here. What
needs values (which tokens are drawn, whether a loss falls) cannot be seen.

A process of its own does this, because the shim must be loaded before torch: see `process.py`.
"""
