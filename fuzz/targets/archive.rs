#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| torch_to_nnef_fuzz::targets::archive(bytes));
