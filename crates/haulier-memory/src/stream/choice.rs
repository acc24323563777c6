//! Which compression is worth it, by what was measured on this channel.
//!
//! Memory gets through as fast as the slower of two things lets it: this side's work, to which a
//! codec adds its time, and the link, for which it leaves less. The link's rate is known when the
//! sender had to wait for it; then both codecs are tried on what is being sent, and the best
//! prediction wins. When the sender does not wait although it compresses, it is the codec that
//! holds it up, and what the link would take is found out by a window without.

use std::time::Duration;

use super::codec::Codec;

/// What a decision is based on, at least.
const WINDOW: Duration = Duration::from_millis(50);

/// A trial of the codecs is good for so long.
const TRIAL_AGE: Duration = Duration::from_secs(1);

/// A window without compression comes after so long, and costs at most a thirtieth of the time.
const PROBE_AGE: Duration = Duration::from_millis(1500);

/// What has to be gained, in per cent, for a heavier codec than the present one.
const GAIN: f64 = 1.1;

/// What one frame cost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    /// Bytes of contents.
    pub(super) raw: u64,
    /// Bytes sent.
    pub(super) wire: u64,
    /// All the time since the frame before.
    pub(super) elapsed: Duration,
    /// Time of it in which the link took nothing.
    pub(super) blocked: Duration,
    /// Time of it in which the contents were compressed.
    pub(super) coding: Duration,
}

/// What a codec does to a sample of the contents.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial {
    /// Bytes of the sample.
    pub(super) raw: u64,
    /// Bytes it was compressed to.
    pub(super) wire: u64,
    /// Time that took.
    pub(super) coding: Duration,
}

/// Chooses for one channel.
#[derive(Debug)]
pub(super) struct Chooser {
    codec: Codec,
    window: Cost,
    /// Bytes per second of the link, when it was last the link that mattered.
    link: Option<f64>,
    trials: Option<[Trial; 2]>,
    trial_age: Duration,
    probe_age: Duration,
}

impl Chooser {
    pub(super) fn new() -> Self {
        Self {
            codec: Codec::None,
            window: Cost::default(),
            link: None,
            trials: None,
            trial_age: Duration::ZERO,
            probe_age: Duration::ZERO,
        }
    }

    /// What to compress the next frame with.
    pub(super) fn codec(&self) -> Codec {
        self.codec
    }

    /// Notes what a frame cost. True asks for a trial of [`Codec::Lz4`] and [`Codec::Zstd`] on what
    /// is sent now, to be given to [`Self::tried`].
    pub(super) fn note(&mut self, cost: Cost) -> bool {
        let window = &mut self.window;
        window.raw += cost.raw;
        window.wire += cost.wire;
        window.elapsed += cost.elapsed;
        window.blocked += cost.blocked;
        window.coding += cost.coding;
        if window.elapsed < WINDOW || window.raw == 0 {
            return false;
        }
        self.trial_age += window.elapsed;
        self.probe_age += window.elapsed;
        let waits = window.blocked * 4 > window.elapsed;
        if waits {
            self.link = Some(window.wire as f64 / window.elapsed.as_secs_f64());
        }
        let stale = self.trials.is_none() || self.trial_age >= TRIAL_AGE;
        let probe = !waits && self.codec != Codec::None && self.probe_age >= PROBE_AGE;
        if probe {
            self.probe_age = Duration::ZERO;
            self.start(Codec::None);
            return false;
        }
        if waits && stale {
            return true;
        }
        self.decide(waits);
        false
    }

    /// Takes the trials it has asked for: LZ4, Zstandard.
    pub(super) fn tried(&mut self, trials: [Trial; 2]) {
        self.trials = Some(trials);
        self.trial_age = Duration::ZERO;
        self.decide(true);
    }

    fn decide(&mut self, waits: bool) {
        let window = self.window;
        let (Some(link), Some([lz4, zstd])) = (self.link, self.trials) else {
            return self.start(self.codec);
        };
        // A link that does not make us wait without compression needs none.
        if !waits && self.codec == Codec::None {
            return self.start(Codec::None);
        }
        let working = window.elapsed.saturating_sub(window.blocked);
        let other = working.saturating_sub(window.coding).as_secs_f64() / window.raw as f64;
        // Bytes of memory per second.
        let rate = |trial: Trial| {
            let coding = trial.coding.as_secs_f64() / trial.raw.max(1) as f64;
            let ratio = trial.raw as f64 / trial.wire.max(1) as f64;
            (1.0 / (other + coding).max(1e-12)).min(link * ratio)
        };
        let plain = Trial {
            raw: 1,
            wire: 1,
            coding: Duration::ZERO,
        };
        let mut best = (Codec::None, rate(plain));
        for (codec, trial) in [(Codec::Lz4, lz4), (Codec::Zstd, zstd)] {
            let gain = if codec == self.codec { 1.0 } else { GAIN };
            if rate(trial) > best.1 * gain {
                best = (codec, rate(trial));
            }
        }
        self.start(best.0);
    }

    /// Starts a new window.
    fn start(&mut self, codec: Codec) {
        self.codec = codec;
        self.window = Cost::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link and a machine: bytes per second.
    struct World {
        link: f64,
        work: f64,
        lz4: (f64, f64),
        zstd: (f64, f64),
    }

    /// Memory that compresses, on one core.
    const TEXT: World = World {
        link: 0.0,
        work: 2.0e9,
        lz4: (0.5e9, 1.8),
        zstd: (0.33e9, 2.4),
    };
    /// Memory that does not.
    const NOISE: World = World {
        link: 0.0,
        work: 2.0e9,
        lz4: (10e9, 1.0),
        zstd: (3.7e9, 1.0),
    };

    const FRAME: f64 = 262_144.0;

    impl World {
        fn coding(&self, codec: Codec) -> (f64, f64) {
            match codec {
                Codec::None => (f64::INFINITY, 1.0),
                Codec::Lz4 => self.lz4,
                Codec::Zstd => self.zstd,
            }
        }

        fn trial(&self, codec: Codec) -> Trial {
            let (speed, ratio) = self.coding(codec);
            Trial {
                raw: FRAME as u64,
                wire: (FRAME / ratio) as u64,
                coding: Duration::from_secs_f64(FRAME / speed),
            }
        }

        /// Sends so many frames. Returns the codec of each, and the seconds that took.
        fn send(&self, chooser: &mut Chooser, frames: usize) -> (Vec<Codec>, f64) {
            let mut codecs = Vec::new();
            let mut seconds = 0.0;
            for _ in 0..frames {
                let codec = chooser.codec();
                let (speed, ratio) = self.coding(codec);
                let coding = FRAME / speed;
                let working = coding + FRAME / self.work;
                let elapsed = working.max(FRAME / ratio / self.link);
                let cost = Cost {
                    raw: FRAME as u64,
                    wire: (FRAME / ratio) as u64,
                    elapsed: Duration::from_secs_f64(elapsed),
                    blocked: Duration::from_secs_f64(elapsed - working),
                    coding: Duration::from_secs_f64(coding),
                };
                if chooser.note(cost) {
                    chooser.tried([self.trial(Codec::Lz4), self.trial(Codec::Zstd)]);
                }
                codecs.push(codec);
                seconds += elapsed;
            }
            (codecs, seconds)
        }
    }

    fn share(codecs: &[Codec], codec: Codec) -> f64 {
        codecs.iter().filter(|other| **other == codec).count() as f64 / codecs.len() as f64
    }

    #[test]
    fn a_fast_link_is_left_alone() {
        for link in [1.5e9, 3e9, 100e9] {
            let world = World { link, ..TEXT };
            let (codecs, _) = world.send(&mut Chooser::new(), 20_000);
            assert_eq!(share(&codecs, Codec::None), 1.0, "{link}");
        }
    }

    #[test]
    fn a_gigabit_is_compressed_densely_and_ten_not_so() {
        let world = World {
            link: 0.117e9,
            ..TEXT
        };
        let (codecs, seconds) = world.send(&mut Chooser::new(), 10_000);
        assert!(share(&codecs, Codec::Zstd) > 0.9);
        let best = 10_000.0 * FRAME / (0.117e9 * 2.4);
        assert!(seconds < best * 1.1, "{seconds} of {best}");

        let world = World {
            link: 0.2e9,
            ..TEXT
        };
        let (codecs, _) = world.send(&mut Chooser::new(), 10_000);
        assert!(share(&codecs, Codec::Lz4) > 0.8);
    }

    #[test]
    fn what_does_not_compress_is_not_compressed() {
        let world = World {
            link: 0.117e9,
            ..NOISE
        };
        let (codecs, _) = world.send(&mut Chooser::new(), 10_000);
        assert_eq!(share(&codecs, Codec::None), 1.0);
    }

    #[test]
    fn it_follows_a_change_of_link_and_of_memory() {
        let mut chooser = Chooser::new();
        World {
            link: 0.117e9,
            ..TEXT
        }
        .send(&mut chooser, 3000);
        assert_eq!(chooser.codec(), Codec::Zstd);
        World {
            link: 0.117e9,
            ..NOISE
        }
        .send(&mut chooser, 3000);
        assert_eq!(chooser.codec(), Codec::None);
        World {
            link: 0.117e9,
            ..TEXT
        }
        .send(&mut chooser, 3000);
        assert_eq!(chooser.codec(), Codec::Zstd);
        let (codecs, _) = World { link: 2e9, ..TEXT }.send(&mut chooser, 20_000);
        assert_eq!(share(&codecs[15_000..], Codec::None), 1.0);
    }
}
