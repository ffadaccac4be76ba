"""What every numba kernel uses: LLVM intrinsics, a thread pool and output memory."""
