"""What `fastgpt2 check`, the tests and the benchmarks check operators with: the error budget, poison, random cases."""
