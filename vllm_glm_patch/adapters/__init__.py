"""vLLM's MoE call, in all its generations, onto `moe/`. Nothing else knows the insides of vLLM's MoE layers.

    modular_kernel.py   what one call of vLLM's modular kernel hands over, whichever release makes it
    conditions.py       whether our kernel can serve a layer, and why not
    serving.py          one process: which layers are served, by whom at which token counts, what was said
    self_test.py        a layer's real weights, ours against vLLM's own kernel, before the server is ready
    failures.py         what an exception of our kernel means: one that cannot be compiled, the device lost, or neither

Nothing of vLLM is imported: all that is needed hangs on the objects of the call. What is read of them is listed in
modular_kernel.py, and `make matrix` looks for it in every release.
"""
