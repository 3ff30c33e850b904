"""The kernels of fastgpt2. `fastgpt2_kernels.ops` holds the public operators, which call everything else."""
