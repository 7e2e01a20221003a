"""Reviews and their one-word sentiment: positive, negative or neutral.

Every sentence is written by hand. Training repeats each alone and followed by another remark about the same thing or
about the whole; the held-out reviews are about things that training never mentions, and none of their sentences is in
it. A review that says nothing of how it was is neutral.
"""

from __future__ import annotations

from random import Random

LABELS = ("positive", "negative", "neutral")

# thing -> positive | negative | neutral remarks, one a line
REVIEWS = {
    "restaurant": (
        """The soup was rich and full of flavor.
The waiter remembered our names and made us laugh.
Best pasta I have had in years.
The terrace is lovely in the evening and the fish was perfect.""",
        """The soup arrived cold and nobody apologized.
We waited an hour and then got the wrong dish.
The meat was dry and the plates were dirty.
Overpriced food and a waiter who rolled his eyes at us.""",
        """The restaurant has forty seats and a small terrace.
They serve lunch from noon until three.
The menu lists six soups and four kinds of pasta.
It stands on the corner across from the station.""",
    ),
    "hotel": (
        """The bed was so comfortable that we slept until ten.
A wonderful view of the sea from the balcony.
The staff could not have been kinder to our children.
Spotless room and a generous breakfast.""",
        """The room smelled of smoke and the shower leaked.
There were stains on the sheets when we arrived.
It was so loud that we did not sleep at all.
The receptionist was rude and charged us twice.""",
        """Our room was on the third floor.
Check-in is possible from two in the afternoon.
The hotel has two elevators and a parking lot.
Breakfast is served in the hall next to the lobby.""",
    ),
    "phone": (
        """The screen is gorgeous and the battery lasts two days.
Setting it up took a minute and everything just works.
Photos look amazing even at night.
It feels solid and it is blazing fast.""",
        """The battery dies before lunch.
It freezes every time I open the camera.
The screen cracked on the second day.
Calls drop all the time and support never answers.""",
        """The phone comes in black, white and blue.
It weighs 180 grams and has one camera.
The box contains a charger and a cable.
The buttons are on the right side.""",
    ),
    "book": (
        """I could not put it down and read it in one night.
A beautiful story that moved me to tears.
The characters are vivid and the dialogue sparkles.
Funny, clever and full of surprises.""",
        """I gave up after fifty pages of boredom.
The plot makes no sense and the ending is lazy.
Flat characters and clumsy writing.
A waste of paper and of my weekend.""",
        """The book has twelve chapters and an index.
It was first printed in 1987.
The story is set in a village in Portugal.
The cover shows a lighthouse.""",
    ),
    "film": (
        """A brilliant cast and a story that stays with you.
We laughed from beginning to end.
The music is stunning and the pictures are breathtaking.
Easily my favorite film of the year.""",
        """Two hours of my life that I will never get back.
The acting is wooden and the jokes are stale.
I fell asleep halfway through.
A dull remake that nobody needed.""",
        """The film runs for ninety minutes.
It was shot in Iceland in the winter.
The second part comes out in March.
The main role is played by a newcomer.""",
    ),
    "bus": (
        """The bus was on time and the driver was cheerful.
Clean seats, free wifi and a smooth ride.
The cheapest and most pleasant way to the airport.
I love how quiet the new buses are.""",
        """The bus was forty minutes late and packed.
The seats were filthy and the heating was broken.
The driver shouted at an old lady.
It never showed up and I missed my flight.""",
        """The bus leaves every twenty minutes.
Tickets are sold at the machine by the door.
Line seven goes from the harbor to the market.
There are two doors and about fifty seats.""",
    ),
    "app": (
        """This app saves me an hour every day.
Simple, fast and a joy to use.
The new update is fantastic and fixed everything.
I recommend it to all my friends.""",
        """The app crashes whenever I log in.
Full of ads and it drains my battery.
It deleted all my notes and I am furious.
The update ruined a good program.""",
        """The app asks for a name and a password.
There is a version for tablets as well.
The settings are in the menu on the left.
It was updated on Tuesday.""",
    ),
    "shoes": (
        """These shoes are light and fit like a glove.
I walked twelve miles in them without a blister.
They look great and keep my feet dry.
Excellent quality for such a low price.""",
        """The sole came off after a week.
They pinch my toes and give me blisters.
The color faded after the first rain.
Cheap plastic that smells awful.""",
        """The shoes come with a spare pair of laces.
They are made in Italy.
Sizes run from 36 to 45.
They have a brown sole and four eyelets.""",
    ),
    "course": (
        """The teacher explains everything with patience and humor.
I learned more in a week than in a year at school.
The exercises are fun and really useful.
A superb course that I would take again.""",
        """The teacher was bored and came late to every class.
I paid a lot and learned nothing.
The videos are confusing and out of date.
A disappointing course with sloppy notes.""",
        """The course lasts six weeks.
Lessons take place on Mondays and Thursdays.
There are twenty students in each group.
The last unit is about chemistry.""",
    ),
    "doctor": (
        """The doctor listened carefully and took away my fear.
I felt better the very same day.
A warm and competent team.
They saw me at once and were so gentle.""",
        """The doctor did not even look at me.
I waited three hours and left with more pain than before.
They lost my file and blamed me for it.
A cold, careless and arrogant man.""",
        """The practice is on the second floor.
The doctor works there on weekdays.
Patients fill in a form at the desk.
My appointment was at nine.""",
    ),
    "laptop": (
        """The keyboard is a pleasure and the fan is silent.
It handles everything I throw at it.
Worth every cent, I am delighted.
Gorgeous design and a superb display.""",
        """It overheats and shuts down in the middle of work.
Half of the keys stopped working in a month.
The slowest machine that I ever owned.
The hinge broke and the seller refused to help.""",
        """The laptop has three ports on the left.
It ships with a printed manual.
The display measures fourteen inches.
The power supply is gray.""",
    ),
    "park": (
        """A peaceful place with magnificent old trees.
Our kids adored the playground.
The flowers are a delight in spring.
Such a charming spot for a picnic.""",
        """Trash everywhere and broken benches.
The lake stinks and the paths are muddy.
We felt unsafe and left after ten minutes.
They cut down the trees and ruined it.""",
        """The park closes at sunset.
It has a pond and two gates.
Dogs must be kept on a leash.
The path around the lake is a mile long.""",
    ),
    "vacuum": (
        """It picks up everything and hardly makes a sound.
Cleaning the house is almost fun now.
Light, strong and easy to empty.
A fantastic little machine.""",
        """It has no power and spits the dust back out.
The hose tore on the first day.
Terribly loud and useless on carpets.
It broke twice and I want my money back.""",
        """The vacuum has a cord of five meters.
It comes with three nozzles.
The bag holds two liters.
The switch is on the handle.""",
    ),
    "cafe": (
        """The coffee is divine and the cakes are homemade.
Friendly people and the coziest chairs in town.
My favorite place to start the day.
They gave my dog a cookie, how sweet.""",
        """The coffee tasted like burnt water.
Sticky tables and stale cake.
They ignored us for half an hour.
The worst sandwich of my life.""",
        """The cafe opens at eight.
They sell tea, coffee and juice.
The sugar stands on the counter.
It used to be a bakery.""",
    ),
    "delivery": (
        """The parcel came a day early and well packed.
The courier carried it up four floors with a smile.
Fast, cheap and reliable.
I am impressed by how smooth it all went.""",
        """The parcel arrived crushed and wet.
They left it in the rain and lied about it.
Three weeks late and nobody could tell me why.
The courier threw the box over the fence.""",
        """The parcel was sent on Monday.
It came in a brown box with a label.
The tracking number has ten digits.
A signature is needed at the door.""",
    ),
}
REMARKS = (
    """I will be back.
Highly recommended!
Five stars from me.
We are very happy.
I could not ask for more.
Not a single complaint.""",
    """Never again.
Stay away!
One star is too many.
We were very disappointed.
I want a refund.
Not worth the money.""",
    """I was there in June.
My neighbor has been there too.
It was a Wednesday.
I paid by card.
This is the second one.
I read about it in the paper.""",
)

HELD_OUT_REVIEWS = {
    "museum": (
        """The guide made the old maps come alive, a fascinating tour.
Superb paintings and a relaxed atmosphere.
My daughter loved every room.
What a treasure, and the garden is beautiful.""",
        """Half of the rooms were closed and the ticket was a rip-off.
Boring displays and grumpy guards.
It was crowded, hot and badly organized.
The audio guide did not work and nobody cared.""",
        """The museum is closed on Mondays.
The collection covers three floors.
Coats are left in the lockers downstairs.
The building dates from 1902.""",
    ),
    "gym": (
        """The trainers are motivating and the machines are brand new.
I have never felt so welcome in a gym.
Great classes and spotless showers.
Joining was the best decision I made this year.""",
        """Broken machines and a horrible smell in the showers.
They keep charging me although I left.
The trainer made fun of me, I was humiliated.
Far too crowded and the music hurts my ears.""",
        """The gym is open around the clock.
There are eight treadmills by the window.
Members get a plastic card.
Towels are kept on the shelf near the entrance.""",
    ),
    "tent": (
        """It kept us warm and dry through a terrible storm.
Up in two minutes, even I can do it.
Roomy, sturdy and surprisingly light.
We adore this tent and take it everywhere.""",
        """It leaked on the first night and all our clothes got soaked.
The zipper jammed and the poles snapped.
Flimsy junk that fell apart in the wind.
I regret buying this.""",
        """The tent sleeps four people.
It is packed in a green bag.
There are ten pegs and two poles.
The floor is made of nylon.""",
    ),
    "barber": (
        """My hair has never looked better.
He is a true artist and a lovely guy.
A perfect cut at a fair price.
I walked out with a big smile.""",
        """He cut my ear and did not even say sorry.
My hair is a disaster now.
I asked for a trim and he ruined it.
Rough hands, dirty combs and a terrible mood.""",
        """The barber has two chairs and a radio.
A cut takes about half an hour.
He moved here from Ankara.
The shop is next to the bank.""",
    ),
    "dentist": (
        """It did not hurt at all and everyone was so nice.
I used to be afraid, now I actually enjoy going.
Gentle, honest and skilled.
She fixed my tooth brilliantly.""",
        """It hurt for days and he laughed at me.
The filling fell out within a week.
Rude staff and shocking prices.
She pulled the wrong tooth, unbelievable.""",
        """The dentist is on Mill Street.
I have an appointment in April.
The waiting room has six chairs.
X-rays are taken in the room on the right.""",
    ),
}


def write(rng: Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, answer) pairs to train on and held out: 12 held-out remarks a thing, alone."""
    train = []
    for remarks in REVIEWS.values():
        for label, text, whole in zip(LABELS, remarks, REMARKS, strict=True):
            lines = text.splitlines()
            train += [(f"Review: {line}", label) for line in lines]
            train += [(f"Review: {line} {rng.choice(whole.splitlines())}", label) for line in rng.sample(lines, 2)]
            train += [(f"Review: {' '.join(rng.sample(lines, 2))}", label)]
            train += [(f"Review: {rng.choice(whole.splitlines())} {rng.choice(lines)}", label)]
    held_out = [
        (f"Review: {line}", label)
        for remarks in HELD_OUT_REVIEWS.values()
        for label, text in zip(LABELS, remarks, strict=True)
        for line in text.splitlines()
    ]
    return train, held_out
