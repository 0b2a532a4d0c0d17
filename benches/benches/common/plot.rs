//! Plots figures over message sizes, as SVG.

use std::error::Error;
use std::ops::Range;

use plotters::prelude::*;

/// A plot. Both axes are logarithmic.
pub struct Plot<'a> {
    /// The text above it.
    pub caption: &'a str,
    /// The label of the y axis, and its range.
    pub y: (&'a str, Range<f64>),
    pub lines: Vec<Line<'a>>,
}

/// A line: its name, its points, and its width in pixels.
pub type Line<'a> = (&'a str, Vec<(f64, f64)>, u32);

impl Plot<'_> {
    /// Draws it over `sizes`, which are message lengths in bytes.
    pub fn draw(self, sizes: &[usize], path: &str) -> Result<(), Box<dyn Error>> {
        let root = SVGBackend::new(path, (900, 560)).into_drawing_area();
        root.fill(&WHITE)?;
        let x = sizes[0] as f64 * 0.9..sizes[sizes.len() - 1] as f64 * 1.1;
        let (y_desc, y) = self.y;
        let mut chart = ChartBuilder::on(&root)
            .caption(self.caption, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(x.log_scale(), y.log_scale())?;
        chart
            .configure_mesh()
            .x_desc("bytes of a message")
            .y_desc(y_desc)
            .x_label_formatter(&|n| format!("{n:.0}"))
            .draw()?;
        for (n, (name, points, width)) in self.lines.into_iter().enumerate() {
            let colour = Palette99::pick(n).to_rgba();
            let key = colour.stroke_width(3);
            let key = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], key);
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(width)).point_size(3))?
                .label(name)
                .legend(key);
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
}
