// Lazy list: the children of a scrolled element, made a page at a time as they come near.
//
// Owns when they are made. A page that has been made stays; `reach(index)` makes all up to a child and returns it.

const PAGE = 120;

/** `make(index)` gives the element of a child. */
export function createLazyList({ scroller, list, make }) {
  const end = document.createElement("span");
  end.className = "lazy-end";
  end.setAttribute("aria-hidden", "true");
  let count = 0;
  let made = 0;

  function grow(until) {
    const stop = Math.min(count, until);
    const page = document.createDocumentFragment();
    for (; made < stop; made++) page.append(make(made));
    list.append(page);
    if (made < count) list.after(end);
    else end.remove();
  }

  const observer = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      grow(made + PAGE);
      observer.unobserve(end); // so that an end that is still in sight is told of again
      if (made < count) observer.observe(end);
    },
    { root: scroller, rootMargin: "400px" },
  );

  return {
    get made() {
      return made;
    },
    /** A new list of children, or the same one grown: children before `kept` stay as they are. */
    reset(numChildren, kept = 0) {
      count = numChildren;
      made = Math.min(made, kept);
      while (list.children.length > made) list.lastElementChild.remove();
      grow(Math.max(made, PAGE));
      observer.unobserve(end);
      if (made < count) observer.observe(end);
    },
    reach(index) {
      if (index >= made) grow(index + PAGE);
      return list.children[index];
    },
  };
}
