//! What the destination has of each task, and whether it still is what the task has.

use std::collections::BTreeMap;

use crate::page::PageRange;
use crate::ranges::RangeSet;
use crate::tracker::Scan;

/// Pages that were sent, less those that were written since.
///
/// The order of a round is: look ([`Ledger::apply`]), read the pages, send them ([`Ledger::sent`]).
/// A page that is written while it is read is in the next look.
#[derive(Debug, Default)]
pub struct Ledger {
    tasks: BTreeMap<u32, Account>,
    /// Number of looks so far.
    round: u32,
}

#[derive(Debug, Default)]
struct Account {
    valid: RangeSet,
    /// Pages by the look that last found them written. Disjoint.
    heat: BTreeMap<u32, RangeSet>,
}

impl Ledger {
    /// Nothing was sent.
    pub fn new() -> Ledger {
        Ledger::default()
    }

    /// Takes in a look: pages that were written are not valid any more, and pages outside of the
    /// mappings are no more. Returns, by task, the pages of the latter kind that the destination has
    /// and should drop; of a task that is gone these are all.
    pub fn apply(&mut self, scan: &Scan) -> Vec<(u32, RangeSet)> {
        self.round += 1;
        let mut drops = Vec::new();
        for task in &scan.gone {
            if let Some(account) = self.tasks.remove(task) {
                drops.push((*task, account.valid));
            }
        }
        for found in &scan.tasks {
            let account = self.tasks.entry(found.task).or_default();
            account.valid.subtract(&found.written);
            let kept = account.valid.intersect(&found.mapped);
            let mut dropped = std::mem::replace(&mut account.valid, kept);
            dropped.subtract(&found.mapped);
            drops.push((found.task, dropped));
            account.warm(self.round, found.written.clone(), &found.mapped);
        }
        drops.retain(|(_, pages)| !pages.is_empty());
        drops
    }

    /// The destination has these pages, read after the last look.
    pub fn sent(&mut self, task: u32, pages: &RangeSet) {
        self.tasks.entry(task).or_default().valid.union(pages);
    }

    /// What the destination has and what is still so.
    pub fn valid_pages(&self, task: u32) -> u64 {
        self.tasks
            .get(&task)
            .map_or(0, |account| account.valid.pages())
    }

    /// Of these pages, those that must still be sent.
    pub fn missing(&self, task: u32, lazy: &RangeSet) -> RangeSet {
        let mut missing = lazy.clone();
        if let Some(account) = self.tasks.get(&task) {
            missing.subtract(&account.valid);
        }
        missing
    }

    /// These pages, first those that were written in the latest look, then those of the one before,
    /// and so on; what was never seen written comes last.
    pub fn by_heat(&self, task: u32, pages: &RangeSet) -> Vec<PageRange> {
        let mut rest = pages.clone();
        let mut ordered = Vec::new();
        if let Some(account) = self.tasks.get(&task) {
            for class in account.heat.values().rev() {
                let hot = class.intersect(&rest);
                ordered.extend(hot.iter());
                rest.subtract(&hot);
            }
        }
        ordered.extend(rest.iter());
        ordered
    }
}

impl Account {
    fn warm(&mut self, round: u32, written: RangeSet, mapped: &RangeSet) {
        for class in self.heat.values_mut() {
            class.subtract(&written);
            *class = class.intersect(mapped);
        }
        self.heat.retain(|_, class| !class.is_empty());
        if !written.is_empty() {
            self.heat.insert(round, written);
        }
    }
}

#[cfg(test)]
mod tests;
