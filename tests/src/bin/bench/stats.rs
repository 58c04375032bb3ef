//! Medians, ranges and how they are printed.

/// The middle one, or the mean of the two middle ones; `None` of nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (
        sorted.get(sorted.len().checked_sub(1)? / 2)?,
        sorted.get(sorted.len() / 2)?,
    );
    Some((low + high) / 2.0)
}

/// Smallest and largest; `None` of nothing.
pub(crate) fn range(values: &[f64]) -> Option<(f64, f64)> {
    Some((
        values.iter().copied().reduce(f64::min)?,
        values.iter().copied().reduce(f64::max)?,
    ))
}

/// The value below which `percent` of the sorted values lie (nearest rank); `None` of nothing.
pub(crate) fn percentile(sorted: &[u32], percent: usize) -> Option<u32> {
    sorted
        .get((sorted.len() * percent).div_ceil(100).checked_sub(1)?)
        .copied()
}

/// Three figures, thousands set apart: `14 300`, `65.2`, `0.341`.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        0.0..0.9995 => format!("{value:.3}"),
        0.9995..9.995 => format!("{value:.2}"),
        9.995..999.5 => format!("{value:.1}"),
        _ => {
            let digits = format!("{value:.0}");
            let (head, tail) = digits.split_at(digits.len().saturating_sub(3));
            format!("{head} {tail}")
        }
    }
}

/// `median (smallest to largest)`, or the value alone if there is one.
pub(crate) fn spread(values: &[f64]) -> Option<String> {
    let (low, high) = range(values)?;
    let middle = figure(median(values)?);
    Some(if values.len() == 1 {
        middle
    } else {
        format!("{middle} ({}–{})", figure(low), figure(high))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn percentile_is_the_nearest_rank() {
        let sorted: Vec<u32> = (1..=100).collect();
        assert_eq!(percentile(&sorted, 50), Some(50));
        assert_eq!(percentile(&sorted, 99), Some(99));
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn figures_have_three_digits() {
        let all: Vec<String> = [0.34, 1.5, 65.23, 14_321.4, 999.7, 0.0]
            .into_iter()
            .map(figure)
            .collect();
        assert_eq!(all, ["0.340", "1.50", "65.2", "14 321", "1 000", "0.000"]);
    }
}
