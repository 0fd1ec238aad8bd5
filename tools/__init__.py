"""What people run on a checkout: reports of compilers that run ahead of time, mutants, coverage."""
