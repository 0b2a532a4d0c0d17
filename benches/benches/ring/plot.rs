//! The plot over message sizes: GB/s of every contender, medians.

use std::error::Error;

use adit_benches::report::median;
use plotters::prelude::*;

use crate::{PEERS, Rounds, SIZES, STREAMS};

/// Draws it as SVG.
pub fn draw(all: &Rounds, path: &str) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (900, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let (from, to) = (SIZES[0] as f64 * 0.9, SIZES[SIZES.len() - 1] as f64 * 1.1);
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "One way between two processes, copied in and out",
            ("sans-serif", 20),
        )
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d((from..to).log_scale(), (0.03f64..60.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bytes of a message")
        .y_desc("GB/s")
        .x_label_formatter(&|n| format!("{n:.0}"))
        .draw()?;
    let names = STREAMS.iter().chain(&PEERS);
    for (n, &name) in names.enumerate() {
        let points: Vec<(f64, f64)> = SIZES
            .iter()
            .filter(|&&size| !all.of(name, size).is_empty())
            .map(|&size| (size as f64, median(all.of(name, size)) * size as f64 / 1e9))
            .collect();
        if points.is_empty() {
            continue;
        }
        let colour = Palette99::pick(n).to_rgba();
        let width = if name == "ours" { 4 } else { 2 };
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(width)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}
