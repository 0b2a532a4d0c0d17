//! Asks the processor for guest memory before it is read.
#![allow(unsafe_code)] // one prefetch instruction, which only affects caches

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Prefetches the first cache line of a buffer.
pub(crate) fn first_line<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) {
    let guard = slice.ptr_guard();
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is only a hint. It changes no memory and cannot fault, at any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(guard.as_ptr().cast());
    }
    // Stable Rust has no prefetch for other architectures.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = guard;
}
