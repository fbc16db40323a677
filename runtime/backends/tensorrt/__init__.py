"""Networks on NVIDIA GPUs by TensorRT or TensorRT for RTX, with our kernels before and after the core.

backend.py         TensorRTBackend: images in, scores or labels out, by as many lanes as calls need
lane.py            one of the ways through a GPU: a stream, and all that a batch in flight has to itself
device_network.py  the plan, and its execution contexts
cuda_graphs.py     what a call queues, captured once and launched as one
kernels.py         our kernels (kernels.cu), loaded from an engine; places.py has the tables that they read
device.py          GPU, driver and libraries, checked before anything of an engine is loaded
cuda_bindings.py   NVIDIA's driver bindings by the names of pycuda; buffers.py has memory by either of them
"""
