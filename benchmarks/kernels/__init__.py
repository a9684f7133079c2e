"""Kernels by themselves, beside what torch and the device's bandwidth allow."""
