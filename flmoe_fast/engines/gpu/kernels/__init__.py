"""Triton kernels of the GPU engine, one file each with its launcher.

Everything that differs per coalition is rows of E experts, C coalitions and L tokens. Between kernels a matrix operand
is stored as it will be multiplied: one plane of fp16, bf16 or fp32, or two planes of fp16 whose sum is the number. The
residual stream, LayerNorm statistics and softmax are fp32 throughout.

Importing this folder imports triton; nothing here looks at the machine, allocates, or waits for the device.
"""
