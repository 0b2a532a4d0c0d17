//! The plot over message sizes: how long a message takes there and back, by carrier.

use std::error::Error;

use plotters::prelude::*;

use crate::{Row, SIZES};

/// Draws it as SVG.
pub fn draw(rows: &[Row], path: &str) -> Result<(), Box<dyn Error>> {
    let all = || rows.iter().flat_map(|row| row.sizes_us.iter().copied());
    let least = all().fold(f64::MAX, f64::min);
    let most = all().fold(0.0, f64::max);
    let root = SVGBackend::new(path, (900, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let (from, to) = (SIZES[0] as f64 * 0.9, SIZES[SIZES.len() - 1] as f64 * 1.1);
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "A message there and back: a real guest in QEMU",
            ("sans-serif", 20),
        )
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (from..to).log_scale(),
            (least * 0.7..most * 1.5).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("bytes of a message")
        .y_desc("us, the middle one")
        .x_label_formatter(&|n| format!("{n:.0}"))
        .y_label_formatter(&|n| format!("{n:.0}"))
        .draw()?;
    for (n, row) in rows.iter().enumerate() {
        let points = SIZES.iter().zip(&row.sizes_us);
        let points: Vec<(f64, f64)> = points.map(|(&size, &us)| (size as f64, us)).collect();
        let colour = Palette99::pick(n).to_rgba();
        let width = if row.name.contains("vsock port") {
            2
        } else {
            4
        };
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(width)).point_size(3))?
            .label(row.name)
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
