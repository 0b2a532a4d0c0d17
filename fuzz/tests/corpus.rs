//! Runs every seed, and a fixed number of mutants of the seeds, on any toolchain and without libFuzzer. `ADIT_FUZZ_TARGET` names a target that
//! alone is run, as for libFuzzer.

use std::fs;

use adit_fuzz::{TARGETS, corpus};

/// Mutants of each target.
const MUTANTS: u64 = 4_000;

struct Noise(u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }

    /// Flips, cuts, repeats and splices.
    fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(6) {
            let (at, n) = (self.below(bytes.len()), self.below(32));
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => bytes.extend((0..n).map(|_| self.below(256) as u8)),
                2 => {
                    let end = (at + n).min(bytes.len());
                    let piece = bytes[at.min(end)..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                3 => {
                    let other = &seeds[self.below(seeds.len())];
                    let from = self.below(other.len());
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[from..]);
                }
                _ => {
                    if let Some(b) = bytes.get_mut(at) {
                        *b = [0, 1, 0x7f, 0x80, 0xff, self.below(256) as u8][self.below(6)];
                    }
                }
            }
        }
        bytes.truncate(4096);
        bytes
    }
}

#[test]
fn seeds_and_their_mutants_break_no_rule() {
    let only = std::env::var("ADIT_FUZZ_TARGET").ok();
    for (name, run) in TARGETS {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let dir = corpus(name);
        let mut paths: Vec<_> = fs::read_dir(&dir)
            .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        // Sorted, so that the mutants are the same everywhere.
        paths.sort();
        let seeds: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for (path, seed) in paths.iter().zip(&seeds) {
            let whole = std::panic::catch_unwind(|| run(seed));
            assert!(whole.is_ok(), "{}", path.display());
        }
        let mut noise = Noise(18);
        for n in 0..MUTANTS {
            let input = noise.mutate(&seeds);
            let whole = std::panic::catch_unwind(|| run(&input));
            assert!(whole.is_ok(), "{name}: mutant {n} is {input:02x?}");
        }
    }
}
