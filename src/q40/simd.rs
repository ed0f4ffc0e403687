//! One source, several instruction sets: kernels are plain loops over lanes that the compiler turns into vector code
//! for the best set this machine has. Rust never contracts `a * b + c`, so every version gives the same bits; the
//! baseline version is the oracle of the tests (on `aarch64` NEON is the baseline).

/// Work to compile for several instruction sets. `run` and all it calls in a loop must be `#[inline(always)]`:
/// code that is not inlined keeps the baseline instructions.
pub(super) trait Kernel {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `kernel` with the widest vectors available.
pub(super) fn vectorized<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<K: Kernel>(kernel: K) -> K::Output {
            kernel.run()
        }
        // SAFETY: the three features were detected on this machine.
        return unsafe { avx2(kernel) };
    }
    kernel.run()
}
