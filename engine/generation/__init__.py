"""Generation from the paged KV cache: blocks, scheduler, sampler, the step loop."""
