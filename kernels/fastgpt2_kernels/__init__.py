"""The kernels of fastgpt2: public operators in `fastgpt2_kernels.ops`, everything else is called by them."""
