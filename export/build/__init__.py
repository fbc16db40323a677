"""From an imported model to an engine file: cut off, quantized, cut into stages, tuned, compared, measured.

Begin with engine.py, which does these in turn, and config.py, which says what is asked for.

core, joined_heads, low_precision                  the core, of one output or several, in the precision asked for
cutting_places, cut_stages, fine_stages            the core as stages; more of them for tiles alone
cut_passes                                         a core that pools over the whole image
working_memory, measured_memory                    the memory that stages take: estimated, measured
targets/                                           a builder for each kind of target
autotune, openvino_differences                     which library runs a network fastest, and which may not run it
parity, golden                                     whether an engine gives what the model gives; the sample in it
gpus                                               NVIDIA's GPUs by name
draft, report_parts                                an engine before it is written; what its report tells
standalone                                         an ONNX that labels by itself, in place of an engine
"""
