//! Pages that a dump has left behind, as the proxy sees them: which are still to be fetched, in which
//! order, and how their dump has to end. No IO.
//!
//! A page is fetched once: what is asked for and not here any more is on its way.

use std::collections::{BTreeMap, VecDeque};

use haulier_memory::page::{PAGE, PageRange};
use haulier_memory::ranges::RangeSet;

/// Pages fetched at once where nobody waits for one of them.
pub(crate) const CHUNK: u64 = 64;
/// Pages fetched with one that a task waits for, which are likely to be next.
const AROUND: u64 = 16;
/// Most pages that are remembered as waited for. Those of more faults come in their turn.
const MOST_URGENT: usize = 1 << 16;

/// How the pages of a dump stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No restore has begun.
    Waiting,
    /// One may have begun: the tasks may run there.
    Begun,
    /// CRIU has restored them.
    Restored,
    /// Every page is in its place: they are no longer needed here.
    Placed,
    /// They run nowhere else and never will: they run on here. Why.
    Returned(String),
    /// They may have run elsewhere, and cannot go on there for certain: a person has to say. Why.
    Doubt(String),
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Errand {
    /// Let the restore begin, having made sure that the tasks do not run on here whatever comes.
    Begin,
    /// Fetch these pages of this task; whether a task waits for them.
    Get(u32, PageRange, bool),
    /// End the dump; its tasks are killed.
    Finish,
    /// End the dump; its tasks run on.
    Refuse(String),
    /// Leave the tasks as they are, frozen.
    Hold(String),
}

/// Which pages there is room for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Those that tasks wait for.
    pub(crate) urgent: bool,
    /// Those that nobody waits for.
    pub(crate) others: bool,
}

/// The pages of a dump.
#[derive(Debug)]
pub(crate) struct LeftBehind {
    todo: BTreeMap<u32, RangeSet>,
    urgent: VecDeque<(u32, u64)>,
    phase: Phase,
    /// A restore wants to begin.
    wanted: bool,
    /// Whether its CRIU counts pages in 64 bits.
    pub(crate) wide: bool,
    /// Whether its page server has answered.
    pub(crate) serving: bool,
}

impl LeftBehind {
    pub(crate) fn new(wide: bool) -> LeftBehind {
        LeftBehind {
            todo: BTreeMap::new(),
            urgent: VecDeque::new(),
            phase: Phase::Waiting,
            wanted: false,
            wide,
            serving: false,
        }
    }

    /// Pages of a task. False if they make no sense.
    pub(crate) fn add(&mut self, task: u32, range: PageRange) -> bool {
        if range.is_valid() {
            self.todo.entry(task).or_default().insert(range);
        }
        range.is_valid()
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Whether its end is decided.
    pub(crate) fn is_over(&self) -> bool {
        matches!(
            self.phase,
            Phase::Placed | Phase::Returned(_) | Phase::Doubt(_)
        )
    }

    /// A restore wants to begin.
    pub(crate) fn want(&mut self) {
        self.wanted = true;
    }

    /// It begins. False if it may not.
    pub(crate) fn begin(&mut self) -> bool {
        let may = self.phase == Phase::Waiting;
        if may {
            self.phase = Phase::Begun;
        }
        may
    }

    /// The rest may be pushed.
    pub(crate) fn restored(&mut self) {
        if self.phase == Phase::Begun {
            self.phase = Phase::Restored;
        }
    }

    /// All is placed.
    pub(crate) fn placed(&mut self) {
        if matches!(self.phase, Phase::Begun | Phase::Restored) {
            self.phase = Phase::Placed;
        }
    }

    /// The other side says that it failed; `ran`: it may have run.
    pub(crate) fn gave_up(&mut self, why: &str, ran: bool) {
        if self.is_over() {
            return;
        }
        self.phase = if ran {
            Phase::Doubt(why.to_owned())
        } else {
            Phase::Returned(why.to_owned())
        };
    }

    /// It cannot go on, as seen from here.
    pub(crate) fn fail(&mut self, why: &str) {
        let ran = self.phase != Phase::Waiting;
        self.gave_up(why, ran);
    }

    /// Tasks wait for these pages.
    pub(crate) fn fault(&mut self, task: u32, pages: &[u64]) {
        for page in pages {
            if self.urgent.len() < MOST_URGENT {
                self.urgent.push_back((task, *page));
            }
        }
    }

    /// What is to be done next, if anything.
    pub(crate) fn next(&mut self, room: Room) -> Option<Errand> {
        match &self.phase {
            Phase::Placed => return Some(Errand::Finish),
            Phase::Returned(why) => return Some(Errand::Refuse(why.clone())),
            Phase::Doubt(why) => return Some(Errand::Hold(why.clone())),
            Phase::Waiting => return self.wanted.then_some(Errand::Begin),
            Phase::Begun | Phase::Restored => {}
        }
        if room.urgent {
            while let Some((task, page)) = self.urgent.pop_front() {
                if let Some(range) = self.run_at(task, page) {
                    return Some(Errand::Get(task, range, true));
                }
            }
        }
        if self.phase != Phase::Restored || !room.others {
            return None;
        }
        let (task, set) = self.todo.iter().find(|(_, set)| !set.is_empty())?;
        let (range, _) = set.iter().next()?.split(CHUNK);
        Some(Errand::Get(*task, range, false))
    }

    /// A page by which the page server can show that it answers.
    pub(crate) fn first(&self) -> Option<(u32, PageRange)> {
        let all = self.todo.iter();
        all.filter_map(|(task, set)| Some((*task, set.iter().next()?.split(1).0)))
            .next()
    }

    /// These pages are on their way.
    pub(crate) fn fetched(&mut self, task: u32, range: PageRange) {
        if let Some(set) = self.todo.get_mut(&task) {
            set.remove(range);
        }
    }

    /// Pages that are still to be fetched.
    pub(crate) fn pages(&self) -> u64 {
        self.todo.values().map(RangeSet::pages).sum()
    }

    /// From this page on, what is still to be fetched.
    fn run_at(&self, task: u32, page: u64) -> Option<PageRange> {
        let set = self.todo.get(&task)?;
        let end = page.checked_add(AROUND * PAGE)?;
        let run = set.within(page, end).next()?;
        (page % PAGE == 0 && run.start == page).then_some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URGENT: Room = Room {
        urgent: true,
        others: false,
    };
    const ALL: Room = Room {
        urgent: true,
        others: true,
    };

    fn left() -> LeftBehind {
        let mut left = LeftBehind::new(true);
        let range = |start, pages| PageRange {
            start: start * PAGE,
            pages,
        };
        assert!(left.add(7, range(100, 200)));
        assert!(left.add(8, range(100, 1)));
        assert!(!left.add(8, range(0, 0)));
        left
    }

    #[test]
    fn a_page_that_is_waited_for_comes_first_and_once() {
        let mut left = left();
        left.fault(7, &[150 * PAGE, 1]);
        assert_eq!(left.next(ALL), None, "nobody has begun");
        left.want();
        assert_eq!(left.next(URGENT), Some(Errand::Begin));
        assert!(left.begin());
        let none = Room {
            urgent: false,
            others: false,
        };
        assert_eq!(left.next(none), None, "it can wait");
        let Some(Errand::Get(7, range, true)) = left.next(URGENT) else {
            panic!("not asked for")
        };
        assert_eq!((range.start, range.pages), (150 * PAGE, AROUND));
        left.fetched(7, range);
        left.fault(7, &[150 * PAGE, 151 * PAGE]);
        assert_eq!(left.next(ALL), None, "it is on its way");
        left.restored();
        let mut pages = 0;
        while let Some(Errand::Get(task, range, false)) = left.next(ALL) {
            assert!(range.pages <= CHUNK);
            pages += range.pages;
            left.fetched(task, range);
        }
        assert_eq!((pages, left.pages()), (201 - AROUND, 0));
        left.placed();
        assert_eq!(left.next(URGENT), Some(Errand::Finish));
    }

    #[test]
    fn tasks_run_on_here_only_if_they_never_ran_there() {
        let refuse = |text: &str| Some(Errand::Refuse(text.to_owned()));
        let hold = |text: &str| Some(Errand::Hold(text.to_owned()));
        let mut never_begun = left();
        never_begun.fail("lost");
        assert_eq!(never_begun.next(ALL), refuse("lost"));
        assert!(!never_begun.begin(), "too late");

        let mut begun = left();
        begun.begin();
        begun.fail("lost");
        assert_eq!(begun.next(ALL), hold("lost"));
        begun.placed();
        begun.gave_up("never ran", false);
        assert_eq!(begun.next(ALL), hold("lost"), "the first word counts");

        let mut failed = left();
        failed.begin();
        failed.gave_up("CRIU", false);
        assert_eq!(failed.next(ALL), refuse("CRIU"));

        let mut placed = left();
        placed.begin();
        placed.placed();
        placed.fail("lost");
        assert_eq!(placed.next(ALL), Some(Errand::Finish));
    }
}
