//! The comparison as a picture: for each number of clients, how many times etcd's throughput.
//!
//! An SVG written by hand: two panels of bars, for writes and for reads, on a logarithmic scale, because
//! twice as fast and half as fast should look alike. It shows ratios only: they travel from machine to
//! machine far better than operations in a second do. It has a background of its own, so that it can be
//! read on a dark page too.

use std::fmt::Write as _;

use super::mix::Workload;
use super::report::{Cell, Cells, name, ratio};
use super::summary::System;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 400.0;

/// The panels' edges.
const TOP: f64 = 86.0;
const BOTTOM: f64 = 330.0;
const LEFT: [f64; 2] = [56.0, 476.0];
const PANEL_WIDTH: f64 = 360.0;

/// Each step of the scale is twice the one before.
const STEP: f64 = 2.0;

/// Who has bars, and in which colour: two of one hue for ours, grey for the other.
const BARS: [(System, &str); 3] =
    [(System::Kvclient, "#0b6e99"), (System::Http, "#6cb8d6"), (System::Redis, "#a3a3a3")];

/// The whole picture. Without etcd among the cells it says so instead.
pub fn draw(cells: &Cells) -> String {
    let mut svg = Svg::new();
    svg.text(WIDTH / 2.0, 28.0, "middle", "bold 17", "Throughput, in multiples of etcd's");
    let panels = [(Workload::Write, "writes"), (Workload::Read, "linearizable reads")];
    let ratios = cells.keys().filter_map(|cell| ratio(cells, cell, System::Etcd));
    let (low, high) = ratios.fold((1.0_f64, 1.0_f64), |(low, high), x| (low.min(x), high.max(x)));
    if !cells.keys().any(|cell| cell.system == System::Etcd) {
        svg.text(WIDTH / 2.0, HEIGHT / 2.0, "middle", "15", "etcd was not measured");
        return svg.finish();
    }
    let scale = Scale::around(low, high);
    legend(&mut svg, cells);
    for ((workload, title), left) in panels.into_iter().zip(LEFT) {
        panel(&mut svg, cells, workload, title, left, &scale);
    }
    svg.text(
        WIDTH / 2.0,
        HEIGHT - 12.0,
        "middle",
        "12",
        "clients, each with one operation in flight",
    );
    svg.finish()
}

/// From ratios to heights.
struct Scale {
    low: i32,
    high: i32,
}

impl Scale {
    /// Whole steps around all the ratios, and at least one up.
    fn around(low: f64, high: f64) -> Self {
        let steps = |x: f64| x.log(STEP);
        Self { low: steps(low).floor() as i32, high: (steps(high).ceil() as i32).max(1) }
    }

    fn y(&self, ratio: f64) -> f64 {
        let part = (ratio.log(STEP) - f64::from(self.low)) / f64::from(self.high - self.low);
        BOTTOM - part * (BOTTOM - TOP)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (self.low..=self.high).map(|step| STEP.powi(step))
    }
}

fn legend(svg: &mut Svg, cells: &Cells) {
    let shown: Vec<_> =
        BARS.iter().filter(|(system, _)| cells.keys().any(|cell| cell.system == *system)).collect();
    let mut x = (WIDTH - shown.len() as f64 * 180.0) / 2.0 + 10.0;
    for (system, color) in shown {
        svg.bar(x, 44.0, 12.0, 12.0, color);
        svg.text(x + 18.0, 54.5, "start", "13", name(*system));
        x += 180.0;
    }
}

fn panel(svg: &mut Svg, cells: &Cells, workload: Workload, title: &str, left: f64, scale: &Scale) {
    svg.text(left + PANEL_WIDTH / 2.0, TOP - 10.0, "middle", "bold 14", title);
    for tick in scale.ticks() {
        let (y, color) = (scale.y(tick), if tick == 1.0 { "#333333" } else { "#e2e2e2" });
        svg.line(left, y, left + PANEL_WIDTH, y, color);
        svg.text(left - 6.0, y + 4.0, "end", "12", &format!("{tick}x"));
    }
    let mut clients: Vec<usize> =
        cells.keys().filter(|cell| cell.workload == workload).map(|cell| cell.clients).collect();
    clients.dedup();
    let group = PANEL_WIDTH / clients.len().max(1) as f64;
    let bar = (group * 0.8 / BARS.len() as f64).min(40.0);
    for (index, clients) in clients.into_iter().enumerate() {
        let middle = left + (index as f64 + 0.5) * group;
        svg.text(middle, BOTTOM + 20.0, "middle", "13", &clients.to_string());
        let present = BARS.iter().filter_map(|(system, color)| {
            let cell = Cell { workload, clients, system: *system };
            cells.get(&cell)?;
            Some((ratio(cells, &cell, System::Etcd)?, *color))
        });
        let present: Vec<_> = present.collect();
        let mut x = middle - bar * present.len() as f64 / 2.0;
        for (ratio, color) in present {
            let (y, one) = (scale.y(ratio), scale.y(1.0));
            svg.bar(x + 1.0, y.min(one), bar - 2.0, (y - one).abs().max(1.0), color);
            let above = if ratio >= 1.0 { y - 4.0 } else { y + 12.0 };
            svg.text(x + bar / 2.0, above, "middle", "10", &short(ratio));
            x += bar;
        }
    }
}

/// Two digits, as many as repeat from run to run.
fn short(ratio: f64) -> String {
    if ratio >= 10.0 { format!("{ratio:.0}") } else { format!("{ratio:.1}") }
}

struct Svg(String);

impl Svg {
    fn new() -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"system-ui, sans-serif\" fill=\"#222222\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"8\" fill=\"#ffffff\"/>\n"
        ))
    }

    /// `font` is a size, with a weight before it if it is not the usual one.
    fn text(&mut self, x: f64, y: f64, anchor: &str, font: &str, text: &str) {
        let (weight, size) = font.split_once(' ').unwrap_or(("normal", font));
        // Writing to a string cannot fail, here and below. No text has characters to escape.
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\" \
             font-size=\"{size}\">{text}</text>"
        );
    }

    fn bar(&mut self, x: f64, y: f64, width: f64, height: f64, color: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{color}\"/>"
        );
    }

    fn line(&mut self, x1: f64, y1: f64, x2: f64, y2: f64, color: &str) {
        let _ = writeln!(
            self.0,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{color}\"/>"
        );
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::cell;
    use super::*;

    fn cells() -> Cells {
        Cells::from([
            cell(System::Kvclient, Workload::Write, 1, 150.0),
            cell(System::Etcd, Workload::Write, 1, 100.0),
            cell(System::Kvclient, Workload::Read, 256, 2_500.0),
            cell(System::Http, Workload::Read, 256, 50.0),
            cell(System::Etcd, Workload::Read, 256, 100.0),
        ])
    }

    /// Every ratio is drawn with its number, and nothing else is told of the machine.
    #[test]
    fn ratios_are_drawn() {
        let svg = draw(&cells());
        for text in [">1.5<", ">25<", ">0.5<", ">1<", ">256<", ">32x<", ">0.5x<"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        assert!(!svg.contains("2500") && !svg.contains("NaN") && !svg.contains("inf"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }

    /// Twice and half are equally far from 1, and all ratios are on the scale.
    #[test]
    fn the_scale_is_logarithmic() {
        let scale = Scale::around(0.5, 25.0);
        assert!((scale.y(1.0) - scale.y(2.0) - (scale.y(0.5) - scale.y(1.0))).abs() < 1e-9);
        for ratio in [0.5, 1.0, 25.0] {
            assert!((TOP..=BOTTOM).contains(&scale.y(ratio)));
        }
        assert_eq!(Scale::around(1.0, 1.0).ticks().collect::<Vec<_>>(), [1.0, 2.0]);
    }

    #[test]
    fn without_etcd_there_is_nothing_to_draw() {
        let cells = Cells::from([cell(System::Http, Workload::Write, 1, 10.0)]);
        assert!(draw(&cells).contains("etcd was not measured"));
        assert!(draw(&Cells::new()).contains("etcd was not measured"));
    }
}
