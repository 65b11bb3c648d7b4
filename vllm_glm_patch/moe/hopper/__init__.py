"""The native Hopper backend of the fused MoE layer: kernels of csrc/hopper, launched through libglm_hopper.so.

Nothing chooses it by itself. `backend.why_not` says whether it can serve a problem here, `backend.run` runs one pass.
"""
