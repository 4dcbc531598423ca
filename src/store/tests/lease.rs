//! What the log has to do with leases.

use std::collections::BTreeSet;
use std::time::Duration;

use super::*;

/// A lease was given by a majority of the membership before: it ends before anybody knows of the next one. A change
/// that is cut off again is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_membership_ends_a_lease() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (mut log, promise) = (store.log(), store.promise());
    let own = LeaderId { term: 1, node_id: 1 };
    log.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    let (before, change) = (log_id(1, 0), log_id(1, 2));
    log.blocking_append([put_entry(0, "k", "v"), put_entry(1, "k", "v")]).await.unwrap();
    let until = tokio::time::Instant::now() + Duration::from_secs(3600);
    promise.hold(own, Some(&before), until);
    assert_eq!(promise.leads_alone(), Some(own));

    let membership = Membership::new_with_defaults(vec![BTreeSet::from([1])], []);
    let entry = Entry { log_id: change, payload: EntryPayload::Membership(membership) };
    log.blocking_append([entry]).await.unwrap();
    assert_eq!(promise.leads_alone(), None);
    promise.hold(own, Some(&before), until);
    assert_eq!(promise.leads_alone(), None, "what its voters were asked by has changed");

    log.truncate_after(Some(log_id(1, 1))).await.unwrap();
    promise.hold(own, Some(&before), until);
    assert_eq!(promise.leads_alone(), Some(own));
    drop(log);
    store.close().unwrap();
}
