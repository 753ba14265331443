"""The learner's real code on GPUs that are not there: fake CUDA tensors, a fake process group, and a meter.

Tensors on the GPU have shapes and no values (torch's FakeTensorMode); host tensors are real. So sharding, forward,
backward, optimizer and every collective run as they would, and what raises on a GPU for its code raises here. What
needs values (which tokens are drawn, whether a loss falls) cannot be seen.

    shim.py             lets autograd run on fake CUDA tensors in a build of torch without CUDA; loaded before torch
    cuda_module.py      torch.cuda's Python side: streams, events, properties of the GPU that is played
    triton_launches.py  Triton launches as counted stand-ins
    flash_packages.py   flash-attn's packages as counted stand-ins
    mode.py             decides for each operation what is real and what is fake, and tells the meter
    costs.py            FLOPs of an operation, from its shapes, and which operations launch no kernel
    memory.py           live and peak bytes by kind
    meter.py            what was counted, by phase
    predict.py          counts -> seconds, by stated rates
    present.py          the rates of a GPU that is there
    sizes.py            config.json of the public models, and with fewer blocks
    groups.py           groups of given sizes
    checkpoint.py       a checkpoint of such a model, its weights a hole in a file
    learner.py          a learner on them, its load and its updates
    local_engine.py     the local rollout engine on them
    whole_run.py        the whole of `train` on them
    cases.py            runs cases one after the other
    process.py          the process that does it, from outside
    extrapolate.py      from models with few blocks to whole ones

A process of its own does this, because the shim must be loaded before torch: see `process.py`.
"""
