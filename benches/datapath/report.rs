//! The figures, as a table, as JSON and as a picture.

use std::fmt::Write;

use crate::Measured;
use crate::cases::{Kind, Sample};
use crate::idle::Idle;
use crate::place::{Contender, Means, OURS, On};

/// The least, the middle and the largest of some numbers.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub least: f64,
    pub median: f64,
    pub most: f64,
}

impl Spread {
    fn of(numbers: impl IntoIterator<Item = f64>) -> Spread {
        let mut numbers: Vec<_> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        let (Some(&least), Some(&most)) = (numbers.first(), numbers.last()) else {
            return Spread { least: f64::NAN, median: f64::NAN, most: f64::NAN };
        };
        let middle = [(numbers.len() - 1) / 2, numbers.len() / 2].map(|at| numbers[at]);
        Spread { least, median: (middle[0] + middle[1]) / 2.0, most }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2}..{:.2})", self.median, self.least, self.most)
    }
}

impl Measured {
    fn is_latency(&self) -> bool {
        self.case.kind == Kind::PingPong
    }

    /// What a sample costs, in nanoseconds: processor time for each frame, or the middle round trip.
    fn cost(&self, sample: &Sample) -> f64 {
        if self.is_latency() { percentile(sample, 0.5) } else { sample.cpu_ns }
    }

    /// How many times as much `against` costs, round by round.
    fn ratio(&self, index: usize, against: &Contender) -> Option<Spread> {
        let other = self.case.contenders.iter().position(|contender| contender == against)?;
        let rounds = self.samples[index].iter().zip(&self.samples[other]);
        Some(Spread::of(rounds.map(|(sample, other)| self.cost(other) / self.cost(sample))))
    }
}

/// From how much stolen time on figures are said to be disturbed.
const DISTURBED: f64 = 0.005;

/// What a contender is compared with, and what that is called in the JSON: the bare loop on the same device, and either
/// the conventional back-end or, on another device than a TAP, the same contender on one.
fn references(contender: &Contender) -> [(&'static str, Contender); 2] {
    let floor = ("vs_floor", Contender::Floor(contender.on(), Means::Calls));
    match contender.on() {
        On::Tap => [floor, ("vs_baseline", Contender::Baseline)],
        _ => [floor, ("vs_tap", contender.on_tap())],
    }
}

fn percentile(sample: &Sample, part: f64) -> f64 {
    let at = (sample.trips.len() as f64 * part) as usize;
    sample.trips.get(at.min(sample.trips.len().saturating_sub(1))).map_or(f64::NAN, |nanos| *nanos as f64)
}

/// One case's table.
pub fn print(measured: &Measured) {
    let unit = if measured.is_latency() { "p50 ns, p99, p99.9" } else { "ns of CPU, frames/s" };
    let is_on_others = measured.case.is_on_others();
    let second = if is_on_others { "TAP / it" } else { "baseline / it" };
    println!("{:<34} {:>28}   {:<20} {second:<20}", measured.case.name, unit, "floor / it");
    for (index, contender) in measured.case.contenders.iter().enumerate() {
        let samples = &measured.samples[index];
        let cost = Spread::of(samples.iter().map(|sample| measured.cost(sample)));
        let more = if measured.is_latency() {
            let of = |part| Spread::of(samples.iter().map(|sample| percentile(sample, part))).median;
            format!("{:>9.0} {:>9.0}", of(0.99), of(0.999))
        } else {
            format!("{:>12.0}", Spread::of(samples.iter().map(|sample| sample.rate)).median)
        };
        let [first, second] = references(contender).map(|(_, against)| {
            let is_itself = *contender == against;
            let ratio = (!is_itself).then(|| measured.ratio(index, &against)).flatten();
            ratio.map_or_else(String::new, |ratio| ratio.to_string())
        });
        println!("  {:<32} {:>9.0} {:>18}   {first:<20} {second:<20}", contender.name(), cost.median, more);
        if let (Contender::Beside(_), Some(ratio)) = (contender, measured.ratio(index, &OURS)) {
            println!("    ours / it: {ratio}");
        }
    }
    if measured.stolen >= DISTURBED {
        println!("  Disturbed: others had {:.1} % of the processors meanwhile", 100.0 * measured.stolen);
    }
    println!();
}

/// What an idle back-end costs.
pub fn print_idle(idle: &Idle) {
    let [one, two] = idle.memory_kib;
    println!("idle");
    println!("  wake-ups in a second             {:>9.1}", idle.wakeups_per_s);
    println!("  memory, 1 pair                   {one:>9} KiB, without what is shared with the guest");
    println!("  memory, 2 pairs                  {two:>9} KiB");
    println!("  until it listens                 {:>9.1} ms, median", idle.until_listening.as_secs_f64() * 1e3);
    println!("  until the first frame            {:>9.1} ms, median", idle.until_first_frame.as_secs_f64() * 1e3);
}

/// All figures. Names have nothing in them that JSON would have escaped.
pub fn json(all: &[Measured], idle: Option<&Idle>) -> String {
    let mut out = format!("{{\n  \"machine\": {:?},\n  \"cases\": [", crate::place::machine());
    for (at, measured) in all.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        let (name, stolen) = (measured.case.name, measured.stolen);
        let _ = write!(out, "{comma}\n    {{\"name\": {name:?}, \"stolen\": {stolen:.4}, \"contenders\": [");
        for (index, contender) in measured.case.contenders.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let samples = &measured.samples[index];
            let costs: Vec<_> = samples.iter().map(|sample| format!("{:.0}", measured.cost(sample))).collect();
            let _ =
                write!(out, "{comma}\n      {{\"name\": {:?}, \"cost_ns\": [{}]", contender.name(), costs.join(", "));
            if measured.is_latency() {
                for (name, part) in [("p99_ns", 0.99), ("p999_ns", 0.999)] {
                    let of = Spread::of(samples.iter().map(|sample| percentile(sample, part)));
                    let _ = write!(out, ", {name:?}: {:.0}", of.median);
                }
            } else {
                let rates: Vec<_> = samples.iter().map(|sample| format!("{:.0}", sample.rate)).collect();
                let _ = write!(out, ", \"frames_per_s\": [{}]", rates.join(", "));
            }
            for (name, against) in references(contender) {
                if let Some(ratio) = measured.ratio(index, &against) {
                    let _ = write!(out, ", {name:?}: {:.3}", ratio.median);
                }
            }
            out.push('}');
        }
        out.push_str("]}");
    }
    out.push_str("\n  ]");
    if let Some(idle) = idle {
        let [one, two] = idle.memory_kib;
        let _ = write!(
            out,
            ",\n  \"idle\": {{\"wakeups_per_s\": {:.1}, \"memory_kib\": [{one}, {two}], \"listening_ms\": {:.1}, \
             \"first_frame_ms\": {:.1}}}",
            idle.wakeups_per_s,
            idle.until_listening.as_secs_f64() * 1e3,
            idle.until_first_frame.as_secs_f64() * 1e3
        );
    }
    out.push_str("\n}\n");
    out
}

const ROW: usize = 44;
const LEFT: usize = 300;
const WIDTH: usize = 860;
/// Pixels for a ratio of 1.
const ONE: f64 = 80.0;

/// The ratios of ours as bars, readable on light and on dark ground.
pub fn svg(all: &[Measured]) -> String {
    let all: Vec<_> = all.iter().filter(|measured| !measured.case.is_on_others()).collect();
    let height = 50 + ROW * all.len();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<style>text{{fill:#222}} .f{{fill:#4878cf}} .b{{fill:#d1813b}} line{{stroke:#888}} \
         @media (prefers-color-scheme: dark){{text{{fill:#ddd}}}}</style>\n\
         <text x=\"{LEFT}\" y=\"18\">How many times as much CPU time (round trip: time) as ours: <tspan class=\"f\">bare \
         system calls</tspan>, <tspan class=\"b\">conventional back-end</tspan></text>\n"
    );
    let line = LEFT as f64 + ONE;
    let _ = writeln!(out, "<line x1=\"{line}\" y1=\"28\" x2=\"{line}\" y2=\"{height}\" stroke-dasharray=\"3 3\"/>");
    for (row, measured) in all.iter().enumerate() {
        let y = 36 + ROW * row;
        let (label_x, label_y) = (LEFT - 10, y + 20);
        let name = measured.case.name;
        let _ = writeln!(out, "<text x=\"{label_x}\" y=\"{label_y}\" text-anchor=\"end\">{name}</text>");
        let Some(ours) = measured.case.contenders.iter().position(|contender| *contender == OURS) else {
            continue;
        };
        let against = [("f", Contender::Floor(On::Tap, Means::Calls)), ("b", Contender::Baseline)];
        for (bar, (class, against)) in against.iter().enumerate() {
            let Some(ratio) = measured.ratio(ours, against) else { continue };
            let (y, width) = (y + 16 * bar, (ratio.median * ONE).min((WIDTH - LEFT - 60) as f64));
            let (text_x, text_y) = (LEFT as f64 + width + 6.0, y + 12);
            let _ =
                writeln!(out, "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{y}\" width=\"{width:.0}\" height=\"14\"/>");
            let _ = writeln!(out, "<text x=\"{text_x:.0}\" y=\"{text_y}\">{:.2}</text>", ratio.median);
        }
    }
    out.push_str("</svg>\n");
    out
}
