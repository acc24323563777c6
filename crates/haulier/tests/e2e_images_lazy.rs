//! Plain `criu dump --stream --lazy-pages` and `criu restore --stream --lazy-pages`, with an image-proxy
//! that fetches the memory and an image-cache that is the lazy-pages daemon.

mod cast;
mod stage;

use cast::{Cast, Counter};
use haulier_lab::{Captured, Signal};
use stage::play::tree_of;
use stage::{LONG, eventually, lab_program, start};

const PORT: &str = "9100";

/// The options of a dump that becomes a page server.
const LEAVING: [&str; 5] = ["--lazy-pages", "--address", "127.0.0.1", "--port", PORT];

fn lazy_proxy(cast: &Cast, options: &[&str]) -> Captured {
    let mut all = vec!["--lazy-pages", "--page-server", "127.0.0.1:9100"];
    all.extend(options);
    cast.proxy(&all)
}

fn lazy_cache(cast: &Cast, options: &[&str]) -> Captured {
    let mut all = vec!["--lazy-pages"];
    all.extend(options);
    cast.cache(&all)
}

fn nothing_on_disk(cast: &Cast) {
    for host in [1, 2] {
        let files = cast.stage.host(host).shell("find /srv -name '*.img'");
        assert_eq!(files.unwrap().success(), "");
    }
}

#[test]
fn the_memory_of_a_redis_follows_it() {
    let cast = Cast::new();
    let redis = cast.redis(64);
    let cache = lazy_cache(&cast, &[]);
    let restore = cast.restore("/srv/images", &["--lazy-pages"]);
    let restore = restore.spawn_captured().unwrap();
    let proxy = lazy_proxy(&cast, &[]);

    let dump = cast.dump_with_vote(redis, &LEAVING).spawn_captured();
    cast.restored(restore.finish(LONG).unwrap());
    cast.dumped(dump.unwrap().finish(LONG).unwrap());
    cache
        .wait_for_output("all memory of main is in its place", LONG)
        .unwrap();
    proxy
        .wait_for_output("all memory of main has moved", LONG)
        .unwrap();
    assert!(!cast.stage.host(1).process_alive(redis));
    cast.is_right_then_ends(redis, 1, 64);
    nothing_on_disk(&cast);
    // It is not here to be restored again.
    let again = cast.restore("/srv/images", &["--lazy-pages"]);
    assert!(!again.output(LONG).unwrap().status.success());
    cache
        .wait_for_output("it was restored before", LONG)
        .unwrap();
}
