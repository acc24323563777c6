//! Text that a peer sends to be shown to people.

/// Longest text that is shown, in characters.
pub const LONGEST: usize = 4000;

/// Text of a peer as it may go to a terminal or a log: without characters that do something there,
/// and not longer than anybody reads.
pub fn plain(text: &str) -> String {
    let shown = |c: char| match c.is_control() && c != '\n' {
        true => char::REPLACEMENT_CHARACTER,
        false => c,
    };
    text.chars().take(LONGEST).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_cannot_steer_a_terminal() {
        let text = plain(&"\u{1b}]0;mine\u{7}\u{9b}2J\r".repeat(10_000));
        assert!(!text.chars().any(char::is_control), "{text}");
        assert_eq!(text.chars().count(), LONGEST);
        assert_eq!(plain("zwei\nZeilen, größer"), "zwei\nZeilen, größer");
    }
}
