"""What does one GPU reach of what it can do: kernels, steps, whole models?"""
